"""Reading data: shards, the plan of their order, and the loader."""

from open_lm.flags import late_names

__getattr__ = late_names(
    __name__, "open_lm.compat.data", ("DataInfo", "get_data", "get_wds_dataset", "mask_sequence", "sample_chunk")
)
