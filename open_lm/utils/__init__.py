"""Small commands kept under their OpenLM names."""
