"""Words of a consultation: how doctors ask about each topic, and which words mean the same thing.

`ASKING` gives regular expressions per topic, matched on lower-case text; `CONCEPTS` groups words that name one
symptom, body part or habit, so that "temperature" finds a fact about fever. Lists only; `matching` has the logic.
"""

from __future__ import annotations

_IT = r"(?:it|this|that|these|those|they|things|everything|all this|the \w+(?: \w+)?|your \w+(?: \w+)?|any of (?:it|this))"

ASKING: dict[str, tuple[str, ...]] = {
    "onset": (
        r"when (?:did|was|were|do you think)\b.*\b(?:start|beg[aiu]n|first|come on|came on|appear|notice|set in|develop|happen|kick off|crop up|break out)",
        r"when (?:did|does) (?:all )?(?:it|this|that|the \w+(?: \w+)?) (?:all )?(?:start|begin|first|come|go wrong)",
        r"when (?:was|were) (?:the|your) (?:very )?first",
        r"how long ago (?:did|was|were)",
        r"how long ago\b",
        r"what were you doing when",
        r"(?:since|from) when\b",
        r"when you first (?:notice|felt|had|saw|got)",
        r"first (?:notice|start|began|begin|appear|come on|came on|happen|spot|episode|time (?:it|this|you))",
        r"(?:start|begin|began|came on|come on) (?:first|out of the blue)",
        r"what (?:day|time|date|month|year) (?:did|was)\b.*(?:start|beg[aiu]n|happen|come on)",
        r"how did (?:it|this|that|all this|the \w+(?: \w+)?) (?:all )?(?:start|begin|come about|first)",
        r"how (?:and when|when) did",
        r"date back to|go back to|first sign|beginning of (?:it|this|your)",
        r"(?:did|has) "
        + _IT
        + r" (?:only |just )?(?:start|begin|begun|started|come on) (?:recently|today|yesterday|last|this)",
        r"how (?:recent|new) is",
    ),
    "duration": (
        r"how long (?:have|has|had|did|do|does|is|was|would|will|are|were|roughly|usually|typically)",
        r"(?:for )?how (?:long|many (?:days|weeks|months|years|hours|minutes|seconds))\b(?! ago| do you sleep)",
        r"how much of the (?:day|time)",
        r"(?:do|does|did) .*\blast\b(?! (?:night|week|month|year|time|summer|winter|period))",
        r"length of (?:time|each)|time span|duration",
        r"over (?:in|within) (?:seconds|minutes|hours|a)",
        r"(?:been|gone|going|dragged) on for|how long",
        r"how long (?:until|till|before|for)|(?:until|till) (?:it|they) (?:passes|settles?|stops?|goes|clears?)|for (?:a|some) (?:while|time)\b",
        r"before (?:it|they) (?:goes|go|wears?|settles?|passes|pass|stops?)",
    ),
    "frequency": (
        r"how (?:often|frequent(?:ly)?|regularly|many times|many (?:attacks|episodes|bouts|spells|trips|a (?:day|week|month|year)))",
        r"how many (?:of (?:these|them|those)|\w+) (?:do|have|are) you (?:had|have|get|having|getting|go|been)",
        r"(?:times|attacks|episodes|bouts) (?:a|per|each|every) (?:day|week|month|night|year)",
        r"(?:every|each) (?:day|night|week) or|daily or|how far apart|number of (?:times|attacks|episodes)|frequency",
        r"(?:is|are) (?:it|they) (?:a )?(?:daily|weekly|every day|every night|regular thing)",
    ),
    "location": (
        r"\bwhere(?:abouts)?\b(?! (?:do|did|have|are|were) you (?:work|live|been|go|travel|stay|come|sleep|from))",
        r"(?:which|what) (?:part|side|area|spot|place|bit|region|joint|finger|leg|arm|eye|ear|hand|foot|toe)s?\b",
        r"(?:point|show me)(?: with| to| where| the| exactly)",
        r"(?:one|both) (?:side|ear|eye|leg|arm|hand)s?\b.*\bor\b|left or (?:the )?right|right or (?:the )?left",
        r"location|located|in one (?:spot|place)",
    ),
    "radiation": (
        r"(?:spread|radiat|travel|move|shoot|run|go(?:es)?|creep|extend)\w*\b.*\b(?:anywhere|elsewhere|somewhere|arms?|jaw|neck|back|shoulder|legs?|groin|other (?:part|place)|down|into|through|up (?:to|into))",
        r"(?:feel|felt|get|notice|have|had) (?:it|the pain|the \w+) (?:anywhere|somewhere|in any other|in other) ?(?:else|part|place)?",
        r"(?:spread|radiat)(?:s|es|e|ing|ed)?\b|anywhere else|stay (?:put|in one place)",
    ),
    "character": (
        r"what (?:does|do|did|is|was|sort|kind|type|would)\b.*\b(?:feel|like|look|sound|pain|sensation|colou?r|shape|cough|smell)",
        r"(?:describe|put into words|words for)\b(?!.*\b(?:mood|work|job|home|diet|bowel|stool))",
        r"how would you describe",
        r"(?:is|was|are|were|does|do) (?:it|they|the \w+|the pain|that pain|this pain)(?: feel| more)?(?: like)? (?:a |more )?(?:sharp|dull|burning|stabbing|aching|crushing|throbbing|tight|heavy|cramp|squeezing|pressure|constant|steady|griping|gnawing)",
        r"(?:sharp|dull|burning|stabbing|aching|throbbing|crushing),? or",
        r"(?:nature|quality|character|texture) of|what (?:colou?r|shape)|look(?:s)? like|feel(?:s)? like|sounds? like",
    ),
    "severity": (
        r"how (?:bad|severe|intense|strong|painful|sore|awful|unbearable|serious|much (?:does it hurt|pain|discomfort|does it bother))\b",
        r"scale (?:of|from)|out of (?:ten|10|a hundred)|(?:one|1|zero|0|nought) (?:to|and) (?:ten|10)|rate (?:the|your|it|this)",
        r"severity|worst (?:pain|headache|thing)|mild,? (?:or )?moderate|score|grade (?:the|it|your)|how would you rate",
        r"(?:is|was) the \w+ (?:mild|severe|bearable|unbearable)|put a number",
    ),
    "progression": (
        r"(?:got|get|gett|been gett|gotten|becom|become|grow|grown|growing)\w* (?:any |much |steadily )?(?:worse|better|bigger|larger|wider|more|smaller|stronger)",
        r"(?:chang|evolv|progress|improv|worsen|deteriorat|develop)(?:e|ed|ing|es|s)?\b.*\b(?:since|over|time|at all|in any way|then|size|shape|look|lately|days|weeks|months)",
        r"(?:worse|better) (?:or|over|since|than (?:before|when|at)|now)|(?:the )?same (?:or|since|throughout|as when)|up and down|over time|since (?:it|then|the) (?:start|began|first)",
        r"how (?:has|have) (?:it|things|this|that|they|the \w+(?: \w+)?) (?:been|changed|developed|progressed|evolved|gone|moved|altered)",
        r"(?:has|have|did) (?:it|they|the \w+(?: \w+)?) (?:moved?|shift(?:ed)?|spread|grow|grown|changed?)\b",
        r"getting worse|getting better|good days|constant or",
    ),
    "trigger": (
        r"(?:bring|brings|brought|bringing|set|sets|setting|kick|spark|cause|causes|caused|causing|provoke|provokes|trigger|triggers|triggered|triggering)\b.*\b(?:on|off|it|this|them|that|the|attacks?|episodes?|these)",
        r"what (?:makes|made|seems to make|tends to make|can make) .* (?:worse|come|start|flare|happen)",
        r"(?:make|makes|made|making)\b.*\b(?:worse|more painful|hurt more|flare)",
        r"(?:anything|something|things?) (?:in particular |special |you (?:do|did|eat) )?(?:that |which )?(?:make|makes|bring|brings|set|sets|trigger|triggers|start|starts|cause|causes|worsen|worsens|aggravat)",
        r"(?:notice|noticed) .* (?:after|when|with) (?:you|certain|any|eating|exercise)|aggravat|worsen(?:s|ed)? (?:it|when|with|by)|trigger",
        r"(?:related|linked|connected) to (?:anything|eating|exercise|movement|meals|food|activity|exertion)",
        r"(?:comes?|came) on (?:when|with|after|during|if)",
        r"(?:injur|knock|blow|trauma|accident|fall|fell|hurt yourself)",
        r"(?:happen|occur|get it|come)\w*\b.*\b(?:when you|after you|with exercise|on exertion|at rest)",
    ),
    "relief": (
        r"(?:make|makes|made|making)\b.*\b(?:better|easier|go away|stop|ease|bearable|settle)",
        r"(?:help|helps|helped|eas(?:e|es|ed|ing)|reliev(?:e|es|ed|ing)|sooth(?:e|es)|calm(?:s)? (?:it|them)|settl(?:e|es|ed)|shift(?:s)? it|take(?:s)? the edge)\b(?! me\b| you\b| my)(?!.*\b(?:sleep|understand|with the (?:house|shopping)))",
        r"tak(?:e|es|ing) the (?:\w+ )(?:off|out of)|\brelief\b|get rid of it|improve(?:s)? (?:it|when|with|if)|(?:feel|feels|gets?) better (?:if|when|with|after|by)",
        r"go(?:es)? away (?:if|when|with|after|by)|stop(?:s)? (?:it|if you|when you)",
    ),
    "timing": (
        r"(?:what|which|any|certain|particular|specific) (?:time|times|part|parts) of (?:the )?(?:day|night|year|month|week)",
        r"(?:worse|better|worst|bad|happen|come|occur|bother)\w*\b.*\b(?:at night|in the (?:morning|evening|night|afternoon|day)|mornings?|evenings?|night ?time|daytime|overnight|lying|sitting|in bed|meals|empty stomach)",
        r"all at once|creep up|(?:sudden|suddenly|gradual|gradually|all at once|abrupt|abruptly|slowly|bit by bit|how (?:quick|fast|sudden|rapid)(?:ly)?)\b",
        r"(?:pattern|rhythm|regular|constant|come and go|comes and goes|come in|there all the time|continuous|on and off|intermittent|off and on)",
        r"when (?:is|are|does|do) (?:it|they|the \w+(?: \w+)?) (?:usually |mostly |mainly |tend to |at (?:its|their) )?(?:worst|worse|happen|come|occur|bother|bad|strike)",
        r"when do you (?:usually |mostly |tend to )?(?:get|notice|have|feel) (?:it|them|this|the)",
    ),
    "associated": (
        r"(?:any|what|have|had|notice|noticed|other|else|further|more|additional|new)\b.*\b(?:other|associated|accompanying|further|additional|else|new) (?:symptoms?|problems?|complaints?|changes?|signs?|troubles?|things?)",
        r"(?:anything|something|what) else (?:wrong|going on|happening|bothering|troubling|with it|along|that you|you)",
        r"(?:come|go|along|together) with (?:it|this|the \w+)(?: at all)?$",
    ),
    "past_history": (
        r"(?:past|previous|prior|medical|health) (?:medical )?(?:history|problems?|conditions?|illness(?:es)?|issues?|health|troubles?)",
        r"(?:any|other|have|long[- ]?(?:term|standing)|ongoing|existing|known|chronic|serious|underlying) (?:other |long[- ]?(?:term|standing) |serious |medical |health |ongoing |past |previous |chronic |major )*(?:conditions?|illness(?:es)?|diseases?|diagnos[ei]s|health (?:problems?|issues?|conditions?)|medical (?:problems?|conditions?|issues?))",
        r"(?:had|have|experienced|suffered|felt|happened|got|been through|seen)\b.*\b(?:anything|something|this|it|that|attacks?|one|problem|symptoms?)?\b ?(?:like (?:this|it|that)|similar)(?: before| in the past| previously)?",
        r"(?:ever|previously) (?:had|been|suffered|happened|experienced)\b.*\b(?:before|this|it|past|ill|unwell|diagnosed|treated)",
        r"\bbefore\?|in the past|as a child|when you were (?:young|little|a)|childhood|up to date|vaccin|jabs|immuni[sz]|how was (?:the|his|her) birth",
        r"(?:your|his|her|their) (?:general )?health (?:been|like|otherwise|before|in general|usually|generally)|(?:otherwise|usually|generally) (?:well|healthy|fit)",
        r"(?:been|ever) (?:diagnosed|told you (?:have|had)|treated for|admitted|in (?:a )?hospital|hospitali[sz]ed|seriously ill)|see a doctor (?:regularly|for)|(?:first time) (?:this|it|you)",
        r"(?:do you|have you|does \w+|has \w+)\b.*\b(?:diabetes|high blood pressure|heart (?:disease|attack|problems?)|asthma|cancer|stroke|epilepsy|thyroid (?:problem|disease|trouble))",
    ),
    "medications": (
        r"(?:medic(?:ine|ines|ation|ations)|tablets?|pills?|prescri(?:bed|ption|ptions)|drugs? (?:do you|are you) (?:take|taking)|remed(?:y|ies)|supplements?|vitamins?|painkillers?|inhalers?|over[- ]the[- ]counter|pharmacy|chemist|herbal|contracepti\w+)",
        r"(?:are|is|were) (?:you|he|she) (?:currently |regularly |now |still )?(?:taking|on|using) (?:anything|something|any|other)",
        r"(?:taken|tried|given|used|using|take|taking|put)\b.*\b(?:anything|something) (?:for|to)?\b",
        r"what (?:do|are|does|is|have|has) (?:you|he|she) (?:currently |regularly |already )?(?:take|taking|tried|use|using|given)\b",
        r"(?:paracetamol|ibuprofen|aspirin|antibiotics?|blood[- ]thinners?|steroids?|insulin|antacids?|creams?|ointments?|drops)\b",
    ),
    "allergies": (
        r"allerg\w*",
        r"(?:react|reaction|reacted) (?:badly )?to (?:any|a |medicines?|drugs?|foods?)|intoleran",
    ),
    "family_history": (
        r"(?:family|relatives?|relations?|parents?|mother|father|mum|mom|dad|sisters?|brothers?|siblings?|grandparents?|grand(?:mother|father)|aunts?|uncles?|blood relatives?)\b(?! (?:at home|worry|worried))",
        r"(?:run|runs|running) in (?:the|your|his|her) family|hereditary|inherit|anyone (?:else )?(?:in (?:the|your)|related)|close to you (?:had|have)",
    ),
    "smoking": (r"smok\w+|cigar\w*|tobacco|\bvap(?:e|es|ing)\b|nicotine|roll[- ]?ups?|a pipe|packs? a day",),
    "alcohol": (
        r"alcohol\w*|\bdrinker\b|\bbooze|\bwine\b|\bbeers?\b|spirits (?:do|did|a)|units (?:a|per|of)|\bpub\b",
        r"(?:do|did|does) you (?:ever |still |like to |regularly )?drink\b(?! (?:enough|plenty|much water|water|coffee|tea|any (?:coffee|tea|water|fizzy|cola)))",
        r"how much (?:do|did|are|would) you (?:usually |typically )?(?:drink|drinking)|\bor drink\b|(?:anything|much) to drink",
    ),
    "drugs": (
        r"recreational|stimulants?|street drugs?|illegal|illicit|cannabis|\bweed\b|marijuana|cocaine|ecstasy|ketamine|heroin|amphetamine|party drugs?|substances?",
        r"(?:use|used|using|take|taken|taking|do|tried|into) (?:any |other |hard )?drugs\b|drug use",
    ),
    "occupation": (
        r"(?:what|which|where|sort|kind|type|line)\b.*\b(?:work|job|living|occupation|trade|profession|employ\w*)",
        r"(?:your|his|her) (?:work|job|occupation|trade|profession|employment|working life|career)\b|(?:do you|are you|did you) (?:still |currently )?(?:work|working|employed|retired)\b",
        r"what do you do (?:for|all day|as)|for a living|employ(?:er|ed|ment)|money (?:worries|problems|tight|been)|financ\w+|afford|making ends meet|exposed to .* at work|at work\?",
    ),
    "diet": (
        r"\b(?:diet|eat|eats|eating|eaten|ate|appetite|meals?|foods?|breakfast|caffeine|coffee|fluids?|salt(?:y)?|fizzy drinks?|hungry|hunger|thirsty)\b",
        r"(?:drink(?:ing)?) (?:enough|plenty|much water|water|coffee|tea|any (?:coffee|tea|water|fizzy|cola))",
    ),
    "travel": (
        r"travel(?:l?ed|l?ing|s)?\b(?!.*\b(?:arm|jaw|back|leg|groin|neck|shoulder|down)\b)|abroad|overseas|holiday|trip\b|(?:been|gone) away|flight|flown|flew|another country|foreign|journey|anywhere (?:recently|lately|exotic|unusual)",
    ),
    "exposure": (
        r"(?:contact|exposed|around|near|close to|live with|living with|mix(?:ed)? with)\b.*\b(?:anyone|someone|people|anybody|others?|ill|sick|unwell|poorly|infect\w*|animals?|pets?|similar)",
        r"(?:anyone|anybody|someone|people|others?|colleagues?|friends?|housemates?|flatmates?|children|family)\b.*\b(?:ill|sick|unwell|poorly|the same|same (?:thing|problem|symptoms?)|similar|itch\w*|infect\w*|got it|had it)",
        r"\bpets?\b|\bcats?\b|\bdogs?\b|animals?|ticks?\b|(?:been|got|get|insect|mosquito|bug) (?:bitten|bites?)|\bbit(?:ten|es?)\b|exposure|exposed|sunburn|sunbeds?|mou?ld|dust\b|asbestos|chemicals?",
        r"(?:recent|recently|lately|any) (?:infections?|virus|viral|cold|flu)|swallow(?:ed)? (?:something|anything|a )",
    ),
    "sleep": (
        r"\bsle(?:ep|eps|eping|pt)\b|\bpillows?\b|insomnia|(?:lie|lying|lay) (?:flat|down)|wak(?:e|es|en|ing) (?:you|up|him|her|at|in)|woken|night'?s rest|nightmares?|bad dreams|dreams?\b|a full night",
    ),
    "mood": (
        r"\bmood\b|spirits\b|depress\w*|anxi(?:ous|ety)|stress\w*|emotion\w*|mental(?:ly)?|tearful|\blow\b|\bcoping\b|\bcope\b(?!.*\b(?:housework|shopping|work)\b)|\bsad\b|lonel\w+|hopeless|irritab\w+|suicid\w*|(?:harm|hurt|hurting|harming|kill|killing) (?:yourself|himself|herself)|(?:end|ending|take|taking) your (?:own )?life|better off dead|not being here|panicky",
        r"how (?:are|have|do|were|is) (?:you|things|he|she)(?: been)? (?:feeling|feel|doing|managing|holding up|coping|bearing up)?(?: in yourself| emotionally| mentally| inside| in your(?:self| mind))|within yourself|in yourself|on your mind|how do you feel about (?:yourself|your body)|(?:upset|unhappy|down in|getting you down|feel(?:ing)? down)",
        r"(?:things|life|everything|situation|going on|trouble|problems|arguments|changes) (?:at|with|around) (?:home|school)|home life|at home\?|how (?:are|is) (?:things|life)|support at home",
    ),
    "weight": (
        r"\bweight\b|\bweigh\w*|(?:lost|gained|put on|losing|gaining|dropped) (?:any |some )?(?:weight|pounds|kilos|stone)|clothes (?:got|getting|feel|fit|looser|tighter)|slimmer|thinner|heavier than",
    ),
    "function": (
        r"(?:affect|affected|affecting|impact|interfer\w*|stop|stopped|stopping|limit\w*|prevent\w*|get in the way|hold\w* you back)\b.*\b(?:work|life|daily|day|activities|doing|job|school|hobb\w+|walk\w*|driv\w*|you|sport)",
        r"(?:able to|can you still|manage to|manage with|managing|cope with|do you (?:still )?(?:drive|exercise|walk|play)|struggl\w+ (?:to|with)|difficult\w* (?:to|with)|trouble (?:doing|with everyday)|hard to)\b.*\b(?:work|walk|driv\w+|dress\w*|wash|cook\w*|stairs|shopp\w+|exercise|sport|house\w*|everyday|daily|tasks?|jobs?|normal|things|usual)",
        r"(?:day[- ]to[- ]day|daily|everyday) (?:life|activities|tasks|living|things|routine)|what can(?:'t| not|not) you do|how far can you|(?:can|can't|cannot) (?:you )?(?:no longer|still)|given up|had to stop|missing? (?:work|school)|time off|days off|\bavoid(?:ed|ing)?\b|exercise|drive\b|driving\b|get about|housework",
    ),
    "menstrual": (
        r"\bperiods?\b(?! of)|menstru\w*|\bcycles?\b|time of the month|menopaus\w*|monthl(?:y|ies) bleed|last bleed",
    ),
    "sexual": (
        r"\bsex(?:ual|ually)?\b|sexual\w*|partners?\b|intima\w+|intercourse|erections?|libido|sleeping with|sex life|unprotected|condoms?|relationship|private parts|genital\w*|sexually transmitted|\bSTI\b",
    ),
    "pregnancy": (
        r"pregnan\w*|expecting|conceiv\w*|try(?:ing)? for a (?:baby|child)|miscarr\w*|have (?:any )?children|(?:given|give) birth|born (?:early|at|on|full|prem)|(?:his|her) birth|full[- ]term|antenatal|how many children|want (?:more )?(?:children|a baby)",
    ),
    "surgery": (
        r"\bsurg\w*|operat(?:ion|ions|ed)|under the knife|procedures?\b|had anything (?:removed|taken out)|anaesthetic",
    ),
    "previous_tests": (
        r"(?:had|done|have|any|do|did|been|run|recent|previous|already)\b.*\b(?:tests?|scans?|x-?rays?|investigations?|bloods?(?: tests?)? (?:done|taken)|ecg|ultrasound|mri|ct|endoscop\w*|camera|smears?|check-?ups?|results?|swabs?|biops\w+|screening|samples?|eye test)\b(?! for (?:you|this) (?:now|today))|seen (?:another|a|any other) (?:doctor|specialist|gp|consultant)|\b(?:test|scan|blood) results?",
    ),
    "bowel": (
        r"\bbowels?\b|\bstools?\b|\bpoo(?:s|ing|ed)?\b|diarrh\w*|constipat\w*|motions?\b|opening your|(?:going to|go to|using|use) the (?:toilet|loo|bathroom)|number two|\bnapp(?:y|ies)\b|toilet habits?|(?:blood|colou?r) (?:of|in) your (?:stool|poo)",
    ),
    "urine": (
        r"\burin\w*|\bpee(?:s|ing|d)?\b|\bwee(?:s|ing)?\b|pass(?:ing)? water|waterworks|bladder|\bflow\b|stream\b",
    ),
    "worries": (
        r"\bworr(?:y|ied|ies|ying)\b|concern(?:s|ed)?\b(?! about (?:this|that) (?:result|finding))|afraid|scared|frighten\w*|\bfear\w*|(?:what|how) do you think (?:it|this|is|might|could|may)|your (?:own )?(?:ideas|thoughts|expectations)|think (?:is|might be|could be) (?:going on|causing|wrong|the)|hoping (?:for|i|we|to)|anything (?:else )?(?:on your mind|you(?:'d| would) like to (?:tell|ask|discuss))|playing on your mind|bother(?:s|ing) you (?:the )?most about|dread",
    ),
}
"""Topic -> how a doctor asks about it."""

CONCEPTS: dict[str, str] = {
    "fever": "fever feverish fevers temperature temperatures shivers shivering shivery chills hot burning_up rigors shaky_chills running_hot thermometer",
    "sweat": "sweat sweats sweating sweaty clammy drenched night_sweats soaked perspire",
    "nausea": "nausea nauseous nauseated queasy sick vomit vomits vomiting vomited throw_up threw_up throwing_up being_sick been_sick brought_up bring_up bringing_up sickness",
    "breath": "breath breathless breathlessness breathing breathe breathes short_of_breath puffed winded wheezy_chest air shortness",
    "faint": "faint fainted fainting fainted blackout blackouts black_out blacked_out pass_out passed_out collapse collapsed collapsing conscious consciousness keel knocked_out lose_consciousness lost_consciousness",
    "dizzy": "dizzy dizziness lightheaded light-headed light_headed giddy woozy vertigo spinning unsteady",
    "palpitation": "palpitation palpitations racing_heart heart_racing thumping fluttering heartbeat pounding_heart heart_rate beating thump",
    "swelling": "swelling swellings swollen swell puffy puffiness swelled bigger enlarged",
    "blood": "blood bleed bleeding bleeds bled bloody red",
    "rash": "rash rashes spots spot skin blotches marks eruption",
    "itch": "itch itches itchy itching scratch scratching",
    "numb": "numb numbness tingling tingle tingles tingly pins_and_needles pins feeling_in sensation loss_of_feeling",
    "weak": "weak weakness weaker strength power drop dropping limp",
    "vision": "vision sight eyesight see seeing blurred blurry blurring visual double_vision read_signs",
    "eye": "eye eyes eyelid eyelids",
    "headache": "headache headaches head_pain sore_head migraine",
    "cough": "cough coughs coughing coughed",
    "phlegm": "phlegm sputum mucus spit muck catarrh coughing_anything_up cough_anything_up bring_anything_up bringing_anything_up",
    "wheeze": "wheeze wheezing wheezy whistle whistling whistles",
    "swallow": "swallow swallowing swallowed food_sticking sticks stuck gulp",
    "voice": "voice hoarse hoarseness croaky",
    "hearing": "hear hearing deaf deafness ringing tinnitus",
    "leg": "leg legs calf calves shin",
    "neck": "neck stiff_neck chin_on",
    "joint": "joint joints knuckle knuckles knee knees",
    "stiff": "stiff stiffness stiffen",
    "lump": "lump lumps gland glands node nodes armpit armpits",
    "hair": "hair hairs hairy",
    "tired": "tired tiredness fatigue fatigued exhausted exhaustion energy weary worn_out",
    "urgency": "urgency rush urgent hold hold_on dash",
    "bloat": "bloated bloating bloat wind gas gassy flatulence",
    "discharge": "discharge pus leaking leak oozing drip dripping weeping runny ooze",
    "jaundice": "yellow jaundice yellowing jaundiced",
    "confused": "confused confusion muddled drowsy rambling disoriented delirious not_making_sense",
    "appetite": "appetite eat eating eaten hungry off_food food hunger ate meals",
    "thirst": "thirst thirsty",
    "cold": "cold runny_nose snuffly sniffles sniffly snotty flu",
    "heat": "heat hot warm",
    "memory": "memory memories concentrate concentration focus concentrating forgetful",
    "voices": "voices hearing_things seeing_things hallucinations",
    "suicide": "suicide suicidal harm harming die dying dead kill end_it ending_it self-harm not_being_here",
    "low": "low depressed sad tearful down unhappy miserable spirits gloomy cry crying depression",
    "stress": "stress stressed stressful anxious anxiety panic nervous pressure_at strain worried nerves dread",
    "tablets": "tablet tablets pill pills medicine medicines medication medications prescription prescriptions prescribed",
    "painkiller": "painkiller painkillers paracetamol ibuprofen aspirin naproxen codeine pain_relief anti-inflammatory anti-inflammatories",
    "contraceptive": "contraceptive contraceptives contraception birth_control the_pill coil",
    "thinner": "blood_thinner blood_thinners warfarin anticoagulant anticoagulants",
    "drink": "drink drinks drinking alcohol alcoholic wine beer beers booze spirits vodka whisky rum sherry lager brandy drank",
    "smoke": "smoke smokes smoking smoked smoker cigarette cigarettes tobacco vape vaping pipe roll-ups packs",
    "cannabis": "cannabis weed marijuana cocaine ketamine speed ecstasy recreational illegal drugs illicit",
    "work": "work job working occupation employed profession trade living employment",
    "money": "money afford finances financial bills rent income pension spending",
    "sex": "sex sexual sexually intercourse intimacy intimate slept unprotected libido",
    "partner": "partner partners boyfriend girlfriend husband wife relationship spouse",
    "erection": "erection erections impotence",
    "pregnant": "pregnant pregnancy pregnancies expecting conceive",
    "period": "period periods menstrual menstruation cycle cycles bleed",
    "stool": "stool stools poo poos motion motions bowel bowels nappy diarrhoea diarrhea constipated constipation faeces",
    "pee": "pee peeing wee weeing urine urinate urinating urination waterworks passing_water pass_water",
    "father": "father dad",
    "mother": "mother mum mom",
    "sister": "sister sisters brother brothers sibling siblings",
    "grandparent": "grandmother grandfather gran granny grandparents",
    "family": "family relatives relative relations hereditary",
    "pet": "cat cats dog dogs pet pets animal animals",
    "tick": "tick ticks bite bites bitten insect mosquito mosquitoes",
    "contact": "contact others housemates flatmate flatmates anyone_else anybody_else people_around someone_else same_thing",
    "travel": "travel travelled traveled travelling abroad overseas holiday trip flight flown flew journey",
    "operation": "operation operations surgery surgical operated",
    "night": "night nights overnight night-time nighttime bed",
    "sleep": "sleep sleeping slept asleep insomnia",
    "wake": "wake wakes waking woken woke awake",
    "exercise": "exercise exercising gym sport sports training run running",
    "walk": "walk walking walks walked",
    "drive": "drive driving drives driver car",
    "rest": "rest resting sit_down lie_down stop stopping",
    "weight": "weight weigh pounds kilos stone scales thinner heavier slimmer",
    "clothes": "clothes trousers belt",
    "spread": "spread spreads spreading radiate radiates radiating travel moves elsewhere anywhere_else",
    "jaw": "jaw",
    "arm": "arm arms",
    "chest": "chest breastbone",
    "tummy": "tummy belly stomach abdomen abdominal",
    "groin": "groin testicle testicles ball balls loin",
    "ear": "ear ears earache",
    "nose": "nose nostrils blocked_nose stuffy",
    "mouth": "mouth lips tongue",
    "foot": "foot feet soles toes",
    "hand": "hand hands fingers wrist wrists palms",
    "heart": "heart cardiac",
    "injury": "injury injured injure accident fall fell knock kicked kick hit trauma hurt_yourself bang banged bump bumped blow",
    "worry": "worry worried worries worrying concern concerned concerns afraid scared frightened fear anxious_about",
    "test": "test tests scan scans x-ray investigations results result",
    "heavy": "heavy heavily pads clots flood flooding",
    "conditions": "conditions condition illness illnesses illnesses disease diseases medical_problems health_problems",
    "antibiotic": "antibiotic antibiotics penicillin amoxicillin",
    "steroid": "steroid steroids",
    "cream": "cream creams ointment moisturiser",
    "salt": "salt salty",
    "coffee": "coffee caffeine tea",
    "vaccine": "jabs vaccinations vaccinated vaccination immunisations immunised vaccines",
    "sun": "sun sunburn sunburnt sunbed sunbeds tan tanned burnt",
    "light": "light lights brightness bright photophobia",
    "acid": "acid sour bitter taste reflux",
    "drool": "drool drooling dribble dribbling",
    "empty": "empty emptied emptying finish left_over completely_empty",
    "headinjury": "concussion head_injury",
    "diabetes": "diabetes diabetic sugar",
    "thyroid": "thyroid",
    "cancer": "cancer tumour malignancy",
    "stroke": "stroke strokes",
    "pressure": "pressure blood_pressure hypertension",
    "allergy": "allergy allergies allergic",
    "speech": "speech speaking speak words talking slurred",
    "balance": "balance falls falling stumble trip",
    "smell": "smell smells smelly odour foul",
    "scarring": "scar scars palms creases gums",
    "chickenpox": "chickenpox chicken_pox",
    "eczema": "eczema hay_fever",
    "bones": "bones bone osteoporosis fracture fractures broken break",
    "stones": "stones stone kidney_stones gallstones",
    "kidney": "kidney kidneys",
    "depression_past": "depression episode",
    "colour": "colour color coloured",
    "size": "size bigger larger grown grow growing doubled",
    "voiceless": "muffled",
}
"""Concept -> words (phrases with underscores) that mean it."""

WEAK = frozenset(
    """start began begin first last long when where which how often many much bad score scale worse worst better
    change changed night morning day days week weeks month months year years minutes hours seconds time times ago
    feel felt describe look work job before conditions condition illness medicine tablets family pain hurt ache
    sore problem trouble sick notice noticed since help ease stop sudden gradual side under down up one both low
    new every pattern unwell ill people man woman thing things home move moved spread eat eating food drink red
    skin pressure hot contact others previous every body feel look sound middle clear clots regular length colour
    recent after between cope manage relatives worry afraid fear tests test blood heart bed heavy""".split()
)
"""Words that many questions share: they support a match but never make one, unless their topic was asked for."""

GENERIC = """scale pain painful hurt ache aches sore problem trouble symptom feel feeling felt issue condition skin red bad
    sick body side day days night nights week weeks month months year years time times morning evening today yesterday
    keep keeps get gets getting got go goes going gone come comes coming came up down out off on in over under back round
    one two three four five few lot more most much many really honestly just so very all any some every no not never
    i my me mine myself it its this that these those the a an is am are was were be been being do does did have has had
    having will would can could cannot may might should and or but if as at of to for with from by about when while where
    what which who how why there here he she his her him they them their we our us you your yours
    think know say says said tell look looks looking see make makes made take takes took put want like even though even
    only still first last since ago then than now long start started began thing things something anything nothing
    hardly whole half big little old new good well sorry help life people man woman home house work"""
"""Words that a reply to any patient may hold: they show nothing about this one."""

COMMON = (
    "doctor patient please thank thanks hello okay yes no sorry hear understand understood sounds must hard difficult frightening worrying",
    "uncomfortable unpleasant frustrating upsetting scary tough exhausting concerned concerning important serious possible sure clear",
    "ask asking answer question questions tell telling talk describe explain mention mentioned notice noticed happen happening happened",
    "check examine examination exam look listen find figure help helping support care caring treat treatment manage plan next step steps",
    "better worse same different often always usually sometimes rarely recently lately currently now today later soon before after during",
    "experience experiencing experienced suffer suffering struggle going through cause causing caused reason due because while since until",
    "specific exactly anything something everything nothing someone anyone everyone somewhere anywhere else other another also too either",
    "kind sort type area place part level amount number rate scale little bit lot few several many much more most less least only just even",
    "could would should might may can cannot will shall let us make sure need want like try trying wonder wondering hope glad happy",
    "good great right wrong true kind gentle careful normal usual common general medical health healthy history condition symptom symptoms",
    "discomfort issue issues situation concern concerns information detail details idea ideas example medicine hospital emergency urgent",
    "urgently straight away immediately quickly together first second third one two three four five six seven eight nine ten hundred",
    "day days daily week weeks month months year years hour hours minute minutes morning afternoon evening night time times moment",
    "mother father child children family friend friends wife husband person people school work home house life living daily activity",
    "feel feels feeling felt bothering bother troubling affecting affect affected seem seems appear keep keeps stay start starts started stop",
    "stopped end ends begin change changed increase decrease move moving walk walking run sit sitting stand standing lie lying hold",
    "really very quite rather particularly especially likely perhaps maybe probably definitely certainly enough almost still already yet",
    "which whether however therefore although though unless than then there here those these them they it its this that an and the a of",
    "understandable imagine sharing bringing alone here safe best worst high low strong weak mild moderate severe constant sudden gradual",
    "around above below behind between inside outside left right front across along against without within upon per each every both all",
)
"""Everyday words of a consultation that the scripts do not happen to use."""
