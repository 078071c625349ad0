"""An attack and a network for qadtr-brevitas."""
