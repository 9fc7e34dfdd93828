"""CrypTen 0.4.1 as the stock mode needs it. Nothing else imports CrypTen."""
