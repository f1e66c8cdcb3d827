"""A plan as one HTML page, which is read in a browser without a network."""

from distquant.cli.page.page import plan_html

__all__ = ["plan_html"]
