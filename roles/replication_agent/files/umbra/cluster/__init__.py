"""Who is primary: state, decisions, coordinator and the planned change."""
