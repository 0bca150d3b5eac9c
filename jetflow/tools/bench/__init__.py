"""How fast sampling, training and the reading of its data are here."""
