"""The party's commands: serve, deal, generate, chat, proxy, prepare, certs, doctor."""
