"""Workers on other machines: Ray places them and tells of deaths; queue, dialects and results stay with the server."""
