"""How a masked network is built, trained, judged and recalibrated; between two prunes."""
