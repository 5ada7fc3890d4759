"""What is done to a trained model: explained, changed, shown other data, costed; and sweeps of many.

propagation, attribution, explain       where a detection comes from, and how faithful that is
interventions, ablations, planned, intervene    other attention in a trained model, parts taken out of it (which `parts`
                                        finds), which of it all is measured, and what the model then detects
transfer, unrel                         data that a run was not trained for
predictions, huggingface                other detectors as runs, and our transforms inside them
costs                                   parameters and multiply-adds
sweep, time_left                        many runs side by side, and when they are over
"""
