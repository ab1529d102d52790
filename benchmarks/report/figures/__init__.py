"""Figures, PNG or SVG, for print and for colour-blind readers: what is told by colour is told by shape too."""
