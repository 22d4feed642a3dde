"""One order of experts out of scores on several tasks.

    matrix.py      what the cards of a registry say, as tasks x systems
    points.py      points by ranks (Borda)
    consensus.py   the order of least disagreement (Kemeny; subsets.py: exact; moves.py: by moves)
    means.py       mean scores, with what speaks against them
    pairwise.py    strengths out of who beat whom          (contests.py: the wins, and files of them)
    bootstrap.py   how sure points, places and first places are
    pareto.py      score beside rank, size and latency
    leaderboard.py all of it over one matrix

The methods take plain scores (task -> system -> score); none reads a registry.
"""

from xpert.registry.ranking.consensus import Consensus, disagreement, kemeny
from xpert.registry.ranking.points import Scores, average_ranks, borda

__all__ = ["Consensus", "Scores", "average_ranks", "borda", "disagreement", "kemeny"]
