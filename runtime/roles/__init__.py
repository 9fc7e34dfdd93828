"""Client, server and dealer: as network services, as local processes, or as threads."""
