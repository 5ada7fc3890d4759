"""Pictures and exercises of the walkthroughs. Nothing else imports it."""

from detrlib.teaching import deformable, measures, transforms, walkthrough
from detrlib.teaching.exercises import check
