"""The learner: Megatron-core in ranks under torchrun, driven by the controller through the run directory."""
