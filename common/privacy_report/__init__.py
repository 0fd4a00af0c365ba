"""The privacy report: facts in, one HTML page out; the words in one file for each language."""

from common.privacy_report.facts import Facts, versions
from common.privacy_report.page import render

HTML, JSON = "privacy-report.html", "privacy-report.json"

__all__ = ["HTML", "JSON", "Facts", "render", "versions"]
