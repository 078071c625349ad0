"""From a recipe or a model directory to a calibrated switchable model, and back to disk."""
