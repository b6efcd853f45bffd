"""Large bytes by reference: chunk store, ring, host tier, uploads, reading ahead."""
