"""The report for people to look at: one HTML file with figures, the figures as files, tables for LaTeX."""

from harness.report.page.latex import to_latex
from harness.report.page.page import write_page

__all__ = ["to_latex", "write_page"]
