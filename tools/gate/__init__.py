"""The compile gate: every kernel configuration compiled for every target, its machine code held to rules."""
