"""What a model's summaries are worth: ROUGE and perplexity, beside a baseline without a model."""
