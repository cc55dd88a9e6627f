"""What leaves: programs, state dicts, folded layers, masks applied elsewhere, model cards."""
