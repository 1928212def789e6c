"""Training by gradient steps: its settings, the one step that everything takes, and the loop over it."""
