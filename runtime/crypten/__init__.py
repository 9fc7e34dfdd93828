"""CrypTen 0.4.1 as the stock mode needs it. Only this package imports CrypTen."""
