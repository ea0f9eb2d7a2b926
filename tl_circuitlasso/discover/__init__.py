"""From a model and prompts to a circuit: `run` collects, draws and looks again, `learning` and `garrote` solve."""
