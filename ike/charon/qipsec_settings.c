/*
 * qipsec: settings, and whether this charon can be worked with.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qipsec.h"

#define DEFAULT_SOCKET "/run/q-ipsec/plugin.sock"

static qi_settings_t this_settings;

static const char *this_unfit = "the plugin's hooks are not in place";

/** 1 to 5: for machines so slow that the limits of calls would end good ones;
 *  qipsecd bounds a call at 5 s in any case. */
static u_int patience(void)
{
	int factor = lib->settings->get_int(lib->settings,
									"%s.plugins.qipsec.patience", 1, lib->ns);

	return max(1, min(factor, 5));
}

void qi_settings_load(void)
{
	this_settings = (qi_settings_t){
		.off = strdupnull(lib->settings->get_str(lib->settings,
								"%s.plugins.qipsec.off", NULL, lib->ns)),
		.socket = strdup(lib->settings->get_str(lib->settings,
								"%s.plugins.qipsec.socket", DEFAULT_SOCKET,
								lib->ns)),
		.patience = patience(),
	};
}

void qi_settings_free(void)
{
	free(this_settings.off);
	free(this_settings.socket);
	this_settings = (qi_settings_t){ };
}

const qi_settings_t *qi_settings(void)
{
	return &this_settings;
}

bool qi_off(ike_sa_t *ike_sa)
{
	char *name = ike_sa->get_name(ike_sa), *entry;
	enumerator_t *enumerator;
	bool found = FALSE;

	if (!this_settings.off || !name)
	{
		return FALSE;
	}
	enumerator = enumerator_create_token(this_settings.off, ", ", " ");
	while (!found && enumerator->enumerate(enumerator, &entry))
	{
		found = streq(entry, name);
	}
	enumerator->destroy(enumerator);
	return found;
}

const char *qi_unfit(void)
{
	return this_unfit;
}

void qi_set_unfit(const char *why)
{
	this_unfit = why;
}
