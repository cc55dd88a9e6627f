"""Takes units out of a network: tensors, optimizer and widths, proven against the masked one."""
