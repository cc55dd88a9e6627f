"""Pages, figures and tables made of results; the only rooms that know matplotlib and jinja2."""
