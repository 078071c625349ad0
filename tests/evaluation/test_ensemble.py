import pytest

from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.attacks.location_patch import LocationPatch
from qadtr_brevitas.attacks.patch_auto import PatchAuto
from qadtr_brevitas.attacks.pixel import MiFgsm
from qadtr_brevitas.attacks.random_patch import RandomPatch
from qadtr_brevitas.attacks.sparse_rs import SparseRs
from qadtr_brevitas.evaluation import NamedAttack
from qadtr_brevitas.evaluation.ensemble import missing_ensembles


def added(*attacks):
    return [named.plugin for named in missing_ensembles(list(map(NamedAttack.of, attacks)), "fast")]


def test_each_geometry_and_target_gets_one_ensemble():
    found = added(
        LocationPatch(size=8),
        SparseRs(size=8, queries=5),
        Lavan(size=8, target=3),
        LocationPatch(area=0.05, place=[0, 1], location="none"),
    )
    assert found == [
        PatchAuto(size=8, version="fast"),
        PatchAuto(size=8, target=3, version="fast"),
        PatchAuto(area=0.05, place=(0, 1), version="fast"),
    ]


@pytest.mark.parametrize("attack", [MiFgsm(), RandomPatch(size=8), PatchAuto(size=8)])
def test_pixel_attacks_noise_and_ensembles_get_none(attack):
    assert added(attack) == []


def test_an_ensemble_of_the_same_geometry_is_enough():
    assert added(PatchAuto(size=8, version="standard"), LocationPatch(size=8)) == []
    assert added(PatchAuto(size=8), LocationPatch(size=6)) == [PatchAuto(size=6, version="fast")]
