"""Circuits of a real model: `tasks` makes prompts, `methods` finds circuits, `measure` judges them, `report` prints."""
