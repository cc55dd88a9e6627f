"""`python -m gbp_ray` is the `gbp-ray` command."""

from gbp_ray.cli import main

if __name__ == "__main__":
    main()
