"""The run folder, the contract between training and all that reads it: `folder`, `examples`, `maps`, `history` (what
training has logged) and `results`; `sources` finds models by any name, `detected` is what they see in other pictures.
"""

from detrlib.runs.examples import Example, load_examples
from detrlib.runs.folder import (
    RUNS,
    append_metrics,
    begin_folder,
    class_names,
    environment,
    find_run,
    find_runs,
    is_finished,
    load_results,
    load_table,
    looking_at,
    open_run,
    provenance,
    read_metrics,
    refuse_other_settings,
    refuse_run,
    run_config,
    run_labels,
    run_name,
    run_path,
    save_class_names,
    save_tables,
    truncate_metrics,
)
from detrlib.runs.maps import AttentionStore
