"""What predictions cost: the assignment of queries to objects (`matcher`), then the losses (`criterion`)."""

from detrlib.losses.criterion import Criterion
from detrlib.losses.matcher import Match, MatchingCosts, match
