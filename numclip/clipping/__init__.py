"""What is measured, decided and written, on any device."""
