"""Run the steps of a study as tasks of a Ray cluster: here of one that has only this machine.

On a cluster that is there (`ray start`), `qadtr-brevitas study STUDY --ray` does the same; all nodes have to see the
folder. What is finished is kept: start the script again to go on.
"""

from collections.abc import Sequence
from pathlib import Path

import ray

from qadtr_brevitas.reproduce.study.cluster import run_on_ray
from qadtr_brevitas.reproduce.study.file import load_study
from qadtr_brevitas.reproduce.study.plan import make_plan
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.summary import write_study

STUDY = """
title: Two defenses on digits
recipe: digits_smoke
precisions: [32, 4]
models:
  qat: {label: QAT, defense: uniform}
  qadtr: {label: QADT-R, defense: qadtr, set: {train.attack.steps: 1}}
attacks:
  lavan: {attack: {name: lavan, size: 8, steps: 10}, targets: [3]}
evaluations:
  main: {attacks: [lavan]}
budget: {images: 60, batch_size: 60, patch_images: 64, held_out: 60, pictures: false}
"""


def main(cpus: int = 2, overrides: Sequence[str] = ()) -> list[str]:
    folder = Path("ray_study").resolve()
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(STUDY, encoding="utf-8")
    study = load_study(folder / "study.yaml", overrides)
    plan = make_plan(study, work=folder / "work", output=folder / "report")
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    try:
        outcome = run_on_ray(plan, StudyResources(folder / "work", "cpu"), address="auto", report=print)
    finally:
        ray.shutdown()
    write_study(study, plan, folder / "report", scale="small", command="python ray_study.py")
    print(f"open {folder / 'report' / 'report.html'}")
    return outcome.finished


if __name__ == "__main__":
    main()
