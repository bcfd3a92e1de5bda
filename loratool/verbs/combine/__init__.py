"""The `combine` verb: several adapters become one.

- `combine`: the verb itself: opens the adapters, chooses the format, writes the result and reports.
- `adapter_sum`: collects the changes of all adapters by place in the output, and computes what each place comes to.
"""
