"""Pictures, exercises and small trainings of the walkthroughs. Nothing else imports it."""

from detrlib.teaching import deformable, measures, transforms, walkthrough
from detrlib.teaching.exercises import check
from detrlib.teaching.practice import learn_by_heart
