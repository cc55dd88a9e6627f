"""Ray reads its environment when it is imported, which some tests here do by themselves."""
