/*
 * qipsec: loading, settings, taking and giving back the hooks.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qipsec.h"

#include <dlfcn.h>

#include <plugins/plugin.h>
#include <sa/keymat.h>

#define DEFAULT_SOCKET "/run/q-ipsec/plugin.sock"

static struct {
	/** setting `off`: names of connections, separated by comma or space */
	char *off;
	char *socket;
	const char *unfit;
	bool started;
} this_plugin = {
	.unfit = "the plugin's hooks are not in place",
};

const char *qi_unfit(void)
{
	return this_plugin.unfit;
}

bool qi_off(ike_sa_t *ike_sa)
{
	char *name = ike_sa->get_name(ike_sa), *entry;
	enumerator_t *enumerator;
	bool found = FALSE;

	if (!this_plugin.off || !name)
	{
		return FALSE;
	}
	enumerator = enumerator_create_token(this_plugin.off, ", ", " ");
	while (!found && enumerator->enumerate(enumerator, &entry))
	{
		found = streq(entry, name);
	}
	enumerator->destroy(enumerator);
	return found;
}

/** 1 to 5: for machines so slow that the limits of calls would end good ones;
 *  qipsecd bounds a call at 5 s in any case. */
static u_int patience(void)
{
	int factor = lib->settings->get_int(lib->settings,
									"%s.plugins.qipsec.patience", 1, lib->ns);

	return max(1, min(factor, 5));
}

/** charon built with mediation has other structs: no hook may touch them. */
static bool same_build(void)
{
	bool theirs = dlsym(RTLD_DEFAULT, "connect_manager_create") != NULL;
#ifdef ME
	bool ours = TRUE;
#else
	bool ours = FALSE;
#endif

	if (theirs != ours)
	{
		DBG1(DBG_CFG, "qipsec: built %s mediation (-DME), charon %s: build the "
			 "plugin for this charon. No IKEv2 connection is possible",
			 ours ? "with" : "without", theirs ? "with" : "without");
	}
	return theirs == ours;
}

/** Keymat of a charon that the plugin does not fit: there is none. */
static keymat_t *no_keymat(bool initiator)
{
	return NULL;
}

static bool hook(plugin_t *this, plugin_feature_t *feature, bool reg, void *data)
{
	if (!reg)
	{
		this_plugin.unfit = "the plugin is being unloaded";
		qi_socket_stop();
		qi_kernel_stop();
		qi_ike_stop();
		return TRUE;
	}
	/* whatever fails here, the plugin stays and refuses */
	if (!qi_ike_start() || !qi_kernel_start() ||
		!qi_socket_start(this_plugin.socket, this_plugin.off, patience()))
	{
		this_plugin.unfit = "the plugin could not start";
	}
	else if (!(charon->kernel->get_features(charon->kernel) & KERNEL_POLICY_SPI))
	{
		this_plugin.unfit = "this kernel backend installs outbound SAs late "
							"(no KERNEL_POLICY_SPI)";
	}
	else
	{
		this_plugin.unfit = NULL;
	}
	if (this_plugin.unfit)
	{
		DBG1(DBG_CFG, "qipsec: only connections that are off are possible: %s",
			 this_plugin.unfit);
	}
	return TRUE;
}

METHOD(plugin_t, get_name, char*,
	plugin_t *this)
{
	return "qipsec";
}

METHOD(plugin_t, get_features, int,
	plugin_t *this, plugin_feature_t *features[])
{
	static plugin_feature_t f[] = {
		PLUGIN_CALLBACK(hook, NULL),
			PLUGIN_PROVIDE(CUSTOM, "qipsec"),
				PLUGIN_DEPENDS(CUSTOM, "kernel-ipsec"),
	};
	static plugin_feature_t none[] = {
		PLUGIN_NOOP,
			PLUGIN_PROVIDE(CUSTOM, "qipsec-unfit"),
	};

	if (same_build())
	{
		*features = f;
		return countof(f);
	}
	*features = none;
	return countof(none);
}

METHOD(plugin_t, destroy, void,
	plugin_t *this)
{
	keymat_register_constructor(IKEV2, NULL);
	free(this_plugin.off);
	free(this_plugin.socket);
	this_plugin.off = this_plugin.socket = NULL;
	free(this);
}

/* what charon looks up, also in a build that hides all symbols */
#pragma GCC visibility push(default)
plugin_t *qipsec_plugin_create(void);
#ifdef PLUGIN_DEFINE
PLUGIN_DEFINE(qipsec)
#else
plugin_t *qipsec_plugin_create(void)
#endif
{
	plugin_t *this;

	INIT(this,
		.get_name = _get_name,
		.get_features = _get_features,
		.destroy = _destroy,
	);
	this_plugin.off = strdupnull(lib->settings->get_str(lib->settings,
								"%s.plugins.qipsec.off", NULL, lib->ns));
	this_plugin.socket = strdup(lib->settings->get_str(lib->settings,
								"%s.plugins.qipsec.socket", DEFAULT_SOCKET,
								lib->ns));
	keymat_register_constructor(IKEV2,
								same_build() ? qi_keymat_create : no_keymat);
	return this;
}
#pragma GCC visibility pop
