"""The run folder, the contract between training and all that reads it: `folder`, `opening` (may training begin or go on
in it?), `trained` (from which checkpoint?), `examples`, `maps`, `history` (what training has logged). `results`,
`sinks`, `explained` and `failed` are what several runs say, as tables. `sources` finds models by any name, `detected`
is what they see in other pictures.
"""

from detrlib.runs.examples import Example, load_examples
from detrlib.runs.folder import (
    RUNS,
    append_metrics,
    class_names,
    find_run,
    find_runs,
    is_finished,
    load_results,
    load_table,
    looking_at,
    provenance,
    read_metrics,
    run_config,
    run_labels,
    run_name,
    run_path,
    save_tables,
    training_starts,
    truncate_metrics,
    within_project,
)
from detrlib.runs.maps import AttentionStore
from detrlib.runs.opening import (
    begin_folder,
    environment,
    note_start,
    note_stop,
    open_run,
    refuse_other_settings,
    refuse_run,
    slurm_job,
)
from detrlib.runs.trained import begins_again
