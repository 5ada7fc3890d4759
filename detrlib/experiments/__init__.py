"""What is done to a trained model: explained, changed, shown other data, costed; and sweeps of many.

propagation, gradients, drise, cells    where a detection comes from: by attention, gradients and masks, over cells
attribution, explain                    all of these by name, and how faithful they are
interventions, ablations, parts         other attention in a trained model, parts taken out of it, and what finds these
planned, intervene                      which of it all is measured, and what the model then detects
transfer, unrel                         data that a run was not trained for
predictions                             other detectors as runs
huggingface, watched                    detectors of transformers with our transforms, and what these see
costs                                   parameters and multiply-adds
sweep, sweep_file, time_left            many runs side by side, what asks for them, and when they are over
"""
