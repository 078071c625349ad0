"""Training: the loop, and what a recipe chooses for it: schedules, inputs, gradient rules, regularizers."""
