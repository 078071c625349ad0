"""The pieces of training: precision schedules, gradient rules, regularizers. The loop is `qadtr_brevitas.train`."""
