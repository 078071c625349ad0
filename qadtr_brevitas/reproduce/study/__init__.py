"""Studies: one file names models, seeds, attacks and analyses; what is missing is made, and a report comes out.

Light to import: `file` checks a study, `run` carries it out.
"""
