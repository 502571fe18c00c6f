"""A teacher that has spoken once: what it says of the training split, kept in files.

Distillation then runs without the teacher in memory. Kept are, at every summary token, the k
likeliest next tokens with their log-probabilities and what all others have together; and the hidden
states of chosen layers, of all real tokens. Read in this order:

    codec.py       token ids in few bytes
    manifest.py    what a cache was made of, and whether it fits a run
    shards.py      one file of a cache: records, written whole and memory-mapped on reading
    plan.py        which records there are, found again by their tokens, and which shard holds them
    top_tokens.py  what is kept of a distribution
    write.py       the teacher's pass over the split, over all ranks, and resumed where it ended
    read.py        a batch's answers, in the batch's own order

`makd_llm/teaching.py` puts them together for a run.
"""
