"""From records to tables: what stands in a leaderboard, which rows may be compared, and how people read it."""

from harness.report.leaderboard import Leaderboard, build_leaderboard
from harness.report.pairs import PairTable

__all__ = ["Leaderboard", "PairTable", "build_leaderboard"]
