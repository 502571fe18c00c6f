"""What is kept on disk: Hugging Face folders read and written tensor by tensor, and exports."""
