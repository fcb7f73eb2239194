/* Asked for by bcc's helpers, used by none of ours. */
