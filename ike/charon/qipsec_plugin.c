/*
 * qipsec: loading, taking and giving back the hooks.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qipsec.h"

#include <dlfcn.h>

#include <plugins/plugin.h>
#include <sa/keymat.h>

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
	const qi_settings_t *settings = qi_settings();
	const char *unfit = NULL;

	if (!reg)
	{
		qi_set_unfit("the plugin is being unloaded");
		qi_socket_stop();
		qi_kernel_stop();
		qi_ike_stop();
		qi_state_stop();
		return TRUE;
	}
	qi_state_start();
	qi_ike_start();
	qi_kernel_start();
	/* whatever fails here, the plugin stays and refuses */
	if (!qi_socket_start(settings->socket, settings->off, settings->patience))
	{
		unfit = "the plugin could not start";
	}
	else if (!(charon->kernel->get_features(charon->kernel) & KERNEL_POLICY_SPI))
	{
		unfit = "this kernel backend installs outbound SAs late "
				"(no KERNEL_POLICY_SPI)";
	}
	if (unfit)
	{
		DBG1(DBG_CFG, "qipsec: only connections that are off are possible: %s",
			 unfit);
	}
	qi_set_unfit(unfit);
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
	qi_settings_free();
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
	qi_settings_load();
	keymat_register_constructor(IKEV2,
								same_build() ? qi_keymat_create : no_keymat);
	return this;
}
#pragma GCC visibility pop
