"""The privacy report: facts in, one HTML page out; the words in one file for each language."""

from common.privacy_report.facts import HTML, JSON
from common.privacy_report.page import render

__all__ = ["HTML", "JSON", "render"]
