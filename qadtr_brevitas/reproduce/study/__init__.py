"""Studies: one file names models, seeds, attacks and analyses; what is missing is made, and a report is written.

`file` reads a study, `plan` turns it into steps, `run` runs the steps, and `summary` writes the results.
"""
