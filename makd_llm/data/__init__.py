"""From a file of documents and summaries to the tensors that teacher and student see.

Read in this order:

    builtin.py   the demo's teacher and data: fetched once, verified, kept in a cache folder
    schema.py    what a record is, and how one row becomes one, or an error with file and line
    tables.py    rows of JSONL, JSON, CSV, Parquet and Hub data sets, each with its place
    records.py   `load_records`: whatever the source is, records come out
    prompt.py    a record as token ids: the prompt, then the summary that is to be learnt
    batch.py     examples of unequal length as one padded tensor, with labels
    loader.py    which records make up which optimizer step, on which rank; resumable

This file imports none of them: an objective needs `data.batch` and must not pay for the rest.
"""
