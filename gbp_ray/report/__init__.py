"""Pages and figures from results; the only package that imports matplotlib and jinja2.

Trials that differ only in sparsity and seed are one curve; a point is a mean over seeds with its
sample standard deviation, and differences to dense are taken seed by seed. Where BatchNorm is
re-estimated after each prune, the dense network is measured with both statistics and the better one
counts. The page answers the checklist of Blalock et al. 2020 from the records and says what is
missing. It needs no network, and neither torch nor Ray.
"""
