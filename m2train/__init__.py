"""m2train: reinforcement learning of dialogue models as Baichuan-M2 was trained (arXiv 2509.02208)."""

__version__ = "0.1.0"
